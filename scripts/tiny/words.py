"""The vocabulary of quire-tiny's small world."""

# ruff: noqa: SIM905 - the words read better as text than as a list with one line each

NAMES = (
    "Ada Alan Amir Anna Ben Carla Chen Dora Emil Eva Finn Grace Hugo Ida Ivan Jack Jana Kim Lena Leo Lina Luca Mara "
    "Max Mia Nia Nils Noah Olga Omar Otto Paul Rosa Sam Sara Tara Theo Tom Uma Vera Yuki Zoe"
).split()
CITIES = (
    "Athens Berlin Bern Cairo Delhi Dublin Geneva Hanoi Kyoto Lagos Lima Lisbon London Madrid Nairobi Oslo Paris "
    "Prague Quito Riga Rome Seoul Sofia Tokyo Vienna Warsaw Zagreb"
).split()
THINGS = (
    "apple bag ball bell bike bird boat book box bread brush cake camera candle card chair clock coat coin cup desk "
    "dog door drum egg fan fish flag flower fork glass hat horse house key kite knife lamp leaf lemon map milk mirror "
    "moon mouse nail nest orange paper pear pen piano pillow plant plate ring road rock rope rose ruler salt ship shoe "
    "soap sock spoon star stone sun table tea tent towel tower train tree truck violin wall watch wheel window wolf"
).split()
COLORS = "black blue brown green gray orange pink purple red silver white yellow".split()
JOBS = "baker cook doctor driver farmer painter pilot singer teacher writer".split()
