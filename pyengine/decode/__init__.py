"""What a request may ask of the base policy and where it stops."""
