"""The reverse process: from masks to text."""
