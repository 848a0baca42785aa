-- GET of many apps in turn. Arguments: the domain of their host names, then their app-ids.
-- nginx as a target wants in Host the name that TLS asked for (else it answers 421).

local texts, turn = {}, 0

function init(arguments)
    for index = 2, #arguments do
        local app = arguments[index]
        local host = app .. "-443s." .. arguments[1]
        texts[index - 1] = wrk.format("GET", nil, {["Host"] = host, ["x-dstack-target-app"] = app})
    end
end

function request()
    turn = turn % #texts + 1
    return texts[turn]
end
