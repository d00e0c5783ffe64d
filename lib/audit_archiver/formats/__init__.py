"""The lines and files that the stages hand to each other; man 5 aa-batch describes them."""
