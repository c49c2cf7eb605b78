"""The tests of trigger_opt."""
