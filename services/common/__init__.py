"""What every service shares, kept small. No service is imported here."""
