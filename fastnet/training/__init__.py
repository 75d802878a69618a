"""What trains: the step, the trainer, and what they are given and leave."""
