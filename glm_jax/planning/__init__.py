"""What only `plan` needs: reading compiled programs, estimates, tables."""
