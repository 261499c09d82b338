"""What this machine can do, and what it would take to do it faster: python -m wan.doctor"""
