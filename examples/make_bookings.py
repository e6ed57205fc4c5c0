"""Make the bookings data set: what guests of a restaurant write, and the JSON its software needs.

    python examples/make_bookings.py examples/data

writes ``bookings_train.json`` (400 records) and ``bookings_test.json`` (100 records, no message of
which is in the training set) in Alpaca's fields. The same seed gives the same files. Names, days,
times and counts are varied and must be normalised: "half past seven in the evening" is "19:30", "a
dozen" is 12. Small models fail at this without fine-tuning, and learn it from a few hundred examples.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

INSTRUCTION = "Turn this message into JSON: {message}"

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NAMES = (
    "Meyer", "Okafor", "Silva", "Tanaka", "Novak", "Haddad", "Jensen", "Rossi", "Kowalski", "Patel",
    "Nguyen", "Garcia", "Dubois", "Andersson", "Murphy", "Yilmaz", "Cohen", "Ivanova", "Mbeki", "Larsen",
    "Schmidt", "Fernandez", "Kim", "Costa", "Brown", "Laine", "Horvath", "Popescu", "Reyes", "Walsh",
)  # fmt: skip
DISHES = (
    "lasagne", "pad thai", "mushroom risotto", "fish and chips", "chicken curry", "onion soup",
    "vegetable burger", "seafood paella", "beef stew", "greek salad", "ramen", "pumpkin pie",
)  # fmt: skip

# What is asked for in each message, and therefore the keys of its JSON, in this order.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "book": (
        "A table for {people} on {day} at {time}, please. The name is {name}.",
        "Hello, can we come on {day} at {time}? There will be {people} of us. {name}",
        "{name} here, I need a table on {day}, {time}, for {people} people.",
        "Could you keep a table free at {time} on {day}? We are {people}. Regards, {name}",
        "Please put us down for {day}: {people} guests, {time}, under {name}.",
    ),
    "cancel": (
        "Sorry, {name} has to cancel the table on {day} at {time}.",
        "We can't make it on {day}, please cancel {time}. Name: {name}",
        "This is {name}. Our booking for {time} on {day} is off, I'm afraid.",
        "Please delete the reservation under {name}, {day} at {time}.",
    ),
    "order": (
        "I'd like to pick up {count} portions of {dish} on {day} at {time}. {name}",
        "Can you make {dish} for {name}, {count} portions, ready at {time} on {day}?",
        "{name} would like {count} portions of {dish}, {day} at {time}, to take away.",
        "Take-away for {name}: {dish}, {count} portions, collected on {day} around {time}.",
    ),
}
KEYS = {
    "book": ("people", "day", "time", "name"),
    "cancel": ("day", "time", "name"),
    "order": ("count", "dish", "day", "time", "name"),
}


def say_number(generator: random.Random, number: int) -> str:
    words = [str(number), NUMBERS[number - 1]]
    if number == 12:
        words.append("a dozen")
    return generator.choice(words)


def say_day(generator: random.Random, day: str) -> str:
    return generator.choice((day.capitalize(), day, day.capitalize()[:3]))


def say_time(generator: random.Random, hour: int, minute: int) -> str:
    """One of the ways to say a time between 11:00 and 21:45 in quarters of an hour."""
    part = "in the evening" if hour >= 18 else "in the afternoon" if hour > 12 else "in the morning"
    twelve = (hour - 1) % 12 + 1
    ways = [f"{hour}:{minute:02}", f"{hour}.{minute:02}"]
    ways.append(f"{twelve}{f':{minute:02}' if minute else ''} {'pm' if hour >= 12 else 'am'}")
    if (hour, minute) == (12, 0):
        ways.append("noon")
    elif hour != 12 and not (hour == 11 and minute == 45):  # "in the morning" would be wrong at noon
        word, following = NUMBERS[twelve - 1], NUMBERS[twelve % 12]
        spoken = (f"{word} o'clock", f"quarter past {word}", f"half past {word}", f"quarter to {following}")
        ways.append(f"{spoken[minute // 15]} {part}")
    return generator.choice(ways)


def make_record(generator: random.Random) -> dict[str, str]:
    """One record in Alpaca's fields."""
    intent = generator.choices(list(TEMPLATES), weights=(3, 2, 2))[0]
    hour, minute = generator.randint(11, 21), generator.choice((0, 15, 30, 45))
    people, count = generator.randint(2, 12), generator.randint(2, 12)
    facts: dict[str, object] = {
        "people": people,
        "count": count,
        "dish": generator.choice(DISHES),
        "day": generator.choice(DAYS),
        "time": f"{hour}:{minute:02}",
        "name": generator.choice(NAMES),
    }
    message = generator.choice(TEMPLATES[intent]).format(
        people=say_number(generator, people),
        count=say_number(generator, count),
        dish=facts["dish"],
        day=say_day(generator, str(facts["day"])),
        time=say_time(generator, hour, minute),
        name=facts["name"],
    )
    answer = {"intent": intent} | {key: facts[key] for key in KEYS[intent]}
    output = json.dumps(answer, separators=(",", ":"))
    # Without an input the prompt is a third shorter, and training as much faster.
    return {"instruction": INSTRUCTION.format(message=message), "input": "", "output": output}


def make_records(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` records whose messages all differ."""
    generator = random.Random(seed)
    records: dict[str, dict[str, str]] = {}
    while len(records) < count:
        record = make_record(generator)
        records.setdefault(record["instruction"], record)
    return list(records.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the bookings data set.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=400, help="training records (%(default)s)")
    parser.add_argument("--test", type=int, default=100, help="held-out records (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    records = make_records(options.train + options.test, options.seed)
    options.directory.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", records[: options.train]), ("test", records[options.train :])):
        path = options.directory / f"bookings_{name}.json"
        path.write_text(json.dumps(part, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: {len(part)} records")


if __name__ == "__main__":
    main()
