"""Operator table, packings and file formats. numpy only."""
