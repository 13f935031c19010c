"""What is known exactly: edits and their right answers, paintings, photographs, a pan with its flow."""
