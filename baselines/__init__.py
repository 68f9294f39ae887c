"""Systems that λScale is compared with. Each differs from λScale only in parts and settings; its README lists departures."""
