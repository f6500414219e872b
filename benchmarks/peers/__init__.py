"""What keyreel is measured beside: a function a system, which imports what it needs when it is called."""
