"""`fastlora quickstart`: a real run, offline, in minutes."""
