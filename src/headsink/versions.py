"""Which versions of transformers headsink is tested with: the oldest and the newest."""

OLDEST, NEWEST = "5.19", "5.24"
