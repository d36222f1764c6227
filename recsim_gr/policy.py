Policy=object
