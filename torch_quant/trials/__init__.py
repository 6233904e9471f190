"""What searches by a metric of the user's share: the goal, the trials, and the file of them."""
