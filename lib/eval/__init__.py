"""The evaluation: the rows of the table, their scores, and the table, curves and page of them."""
