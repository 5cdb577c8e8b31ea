"""Every other system of the table, the ablations and the controls; each is off by default."""
