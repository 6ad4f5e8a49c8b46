"""What runs before an answer: profile, train, place, evaluate and pack."""
