"""The one decoding loop: requests of every kind share each step."""
