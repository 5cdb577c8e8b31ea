"""A person's taste: pairs labelled in a page, and models judged blind."""
