"""Every other system of the table, and the two controls; SAIL itself imports none of them."""
