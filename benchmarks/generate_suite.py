def speed_of_suite(config, model, requests):
    return []
