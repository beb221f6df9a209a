"""From students to artifacts that run."""
