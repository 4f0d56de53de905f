"""The one way of seeing a tensor in a user's model, leaving everything as it was."""
