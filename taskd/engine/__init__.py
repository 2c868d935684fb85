"""The worker daemon's supervisor: claims, hands out, settles, keeps its lease, rescues. No plugin code."""
