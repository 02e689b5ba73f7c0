"""One file a method: its losses and nothing else. No optimizer, device, tracker or model loading here."""
