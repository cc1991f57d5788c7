"""Documents before a handler sees them: who draws which, packed and planned, or cut where they are made."""
