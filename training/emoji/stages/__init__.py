"""Stages that train on emoji."""
