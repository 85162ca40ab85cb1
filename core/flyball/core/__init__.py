"""Types, ports and small pure tools that every other part of the house may use.

Imports the standard library, msgspec and pydantic, nothing else: `import flyball.core` stays under 0.2 s.
"""
