"""What is told: verdicts on the nodes, the last runs, the metadata of images."""
