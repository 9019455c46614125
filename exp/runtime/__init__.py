"""What every program stands on: the process group, errors of the user, being asked to stop."""
