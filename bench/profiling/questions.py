"""What a drafter drafts for if no dataset is named: a few questions of several kinds, as people ask assistants. Random
tokens would not do: what a model says to them it soon says again, which is easily drafted."""

QUESTIONS = (
    "Write a short letter to a neighbour whose dog barks at night.",
    "Why is the sky blue during the day and red in the evening?",
    "Write a Python function that returns the n-th prime number.",
    "Shorten this to one sentence: The library will be closed from Monday to Wednesday while new shelves are put up. "
    "Books can be returned at the town hall, and fines will not be charged for these days.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it take? Explain step by step.",
    "Translate into French: We would like a table for four near the window, please.",
    "What should I think of before I buy a used car?",
    "Turn these into a table of name and age: Anna is 31, Ben is two years older, and Clara is 19.",
    "Explain to a child of ten how a vaccine works.",
    "What is wrong with this SQL? SELECT name, COUNT(*) FROM orders WHERE total > 10;",
    "Give me a recipe for a vegetable soup, with amounts for six people.",
    "Correct the mistakes and leave the rest as it is: Their going to market tomorow becuase there fridge are empty.",
    "Compare renting and buying a home, with two arguments for each.",
    "Tell a story about a lighthouse keeper who finds a letter in a bottle.",
    "Who does what by when? Notes: Maria sends the draft by Friday. Tom checks the figures before Maria does so. The "
    "meeting with the printer is on Tuesday, and Lee will be there.",
    "What is 17 % of 250, and how did you find it?",
    "Add a docstring to this: def area(w, h): return w * h",
    "Plan three days in Lisbon for a family with small children.",
    "What is the difference between weather and climate?",
    "Is this review pleased or not, and why? The room was small and the street loud, but what a breakfast!",
)
