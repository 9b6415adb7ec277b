"""What the serving layer alone costs, by way of which a request reaches its model."""
