"""Texts of many shapes that several tests encode."""

TEXTS = [
    "Which planet is known as the red planet?",
    "are judo throws allowed in wrestling",
    "Mars is the fourth planet from the Sun, covered with iron oxide which gives it its colour. " * 3,
    "7",
    "",
    "naïve café — “quotes”, emoji 🙂 and 中文",
    " leading space",
    "A short note.",
]
