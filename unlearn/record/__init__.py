"""The record of edits: what is asked, what was measured, how it is saved, chained and verified."""
