"""Which sub-adapter is worth deploying: search over the ranks of a super-adapter."""
