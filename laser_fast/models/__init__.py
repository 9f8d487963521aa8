"""The network of Laser: encode, forward, objective, and its assembly from a configuration."""
