"""What compression does to the instructions of a prompt, measured."""
