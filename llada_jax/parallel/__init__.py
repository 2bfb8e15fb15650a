"""The mesh, several processes as one program, and what each chip can do."""
