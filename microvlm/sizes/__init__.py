"""What an export makes smaller, and what it weighs before it is made. Imports no torch."""
