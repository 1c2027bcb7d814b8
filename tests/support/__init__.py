"""What tests are made with: services, clients, loads and stand-ins for the providers."""
