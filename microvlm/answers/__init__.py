"""How sure an answer is: declined answers, confidences, and the likeliest answers. numpy only."""
