"""pyengine inside other systems; each module imports its system, and nothing imports a module unasked."""
