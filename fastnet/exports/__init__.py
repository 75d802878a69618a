"""What leaves this project: files that other programs run, with all that these need to know in them."""
