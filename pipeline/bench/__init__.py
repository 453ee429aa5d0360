"""What a backend is worth on this machine: every one measured in turn, against torch fp32."""
