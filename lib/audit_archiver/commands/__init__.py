"""Commands that are neither a stage nor the driver."""
