"""The paper's tables: what was published, which trainings give the counterparts, and running these."""
