"""What lies in the bucket, and what an interrupted run left there."""
