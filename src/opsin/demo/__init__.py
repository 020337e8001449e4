"""The embedded default: seeded pictures and questions, small pretrained parts, and the demo that trains on them."""
