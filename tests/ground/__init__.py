"""The ground that tests, demo and bench stand on: real servers, fault makers, data, and ways to run a command."""
