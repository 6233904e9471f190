"""What quantizing each site does to the outputs, and which sites go back to float."""
