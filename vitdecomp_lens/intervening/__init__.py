"""What editing a run is made of: where components are, what is written there, and what is read of the run."""
